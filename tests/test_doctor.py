"""`doctor`: what it finds of a machine and of a model there, and that what is wrong ends with 1."""

from __future__ import annotations

import errno
import importlib.metadata
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from outlier_mlx.engine.chips import Chip
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure import disk, doctor, doctor_model, versions
from outlier_mlx.measure.checked_results import Check, SelfTest
from outlier_mlx.measure.disk import DiskSpeed, Piece
from outlier_mlx.measure.doctor import Given
from outlier_mlx.measure.expected import Machine
from outlier_mlx.measure.speeds import Speed, speed_here
from outlier_mlx.measure.versions import Version, installed_versions
from tests.builders import Built
from tests.hub import Hub, opened
from tests.large import write_large
from tests.program import assert_refused, run

DISK = DiskSpeed({1: 1.5, 2: 2.75, 4: 2.5}, 8_000_000, 96_000_000, "a file in a folder")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A known disk and CPU, and a self-test that passes; what of a disk was measured."""
    measured: list[Any] = []
    speed = Speed(Machine(None, 1e9, 2e9, 1e-6), "measured here", "this CPU is fast")
    monkeypatch.setattr(
        doctor, "speed_here", lambda chip, q: speed if chip.device == "cpu" else speed_here(chip, q)
    )

    def measure(what: Any, *_: Any) -> DiskSpeed:
        measured.append(what)
        return DISK

    for name in ("measure_folder", "measure_pieces"):
        monkeypatch.setattr(doctor, name, measure)
    sound = SelfTest([Check("a product", None), Check("another", None)], 0)
    monkeypatch.setattr(doctor, "self_test", lambda progress: sound)
    return measured


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14B and 224 experts, of which only headers are there."""
    return write_large(tmp_path_factory.mktemp("large") / "outlier-14b")


def values(found: Any) -> dict[str, Any]:
    return {name: one["value"] for name, one in found.items() if isinstance(one, dict)}


def sources(found: Any) -> dict[str, Any]:
    return {name: one["source"] for name, one in found.items() if isinstance(one, dict)}


# This machine


def test_this_machine(quick: list[Any]):
    found = run("doctor", "--json").json
    assert found.keys() == {"machine", "problems"} and found["problems"] == []
    machine, source = values(found["machine"]), sources(found["machine"])
    assert machine["disk_gb_s"] == 2.75 and source["disk_gb_s"] == "measured here"
    assert found["machine"]["disk_gb_s"]["about"] == (
        "first quartile of random reads of 8.0 MB, 2 at a time: 1.5 at 1, 2.75 at 2, 2.5 at 4;"
        " a file in a folder"
    )
    assert quick == [Path()]
    assert machine["self_test"] == {"right": 2, "of": 2, "kernels": 0}
    assert "kernels do not run here" in found["machine"]["self_test"]["about"]
    for name in ("mlx", "mlx-lm"):
        one = found["machine"][name.replace("-", "_")]
        assert one["value"] == importlib.metadata.version(name)
    assert machine["memory_gb"] > 0 and source["memory_gb"] == "reported by the system"
    assert machine["weights_per_s"] == 1e9 and source["weights_per_s"] == "measured here"
    assert "bandwidth_gb_s" not in machine  # a CPU


def test_lines_are_aligned_and_have_sources(tier: Path, quick: list[Any]):
    done = run("doctor", tier)
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "this machine" and "tier" in lines
    about = [line for line in lines if line.startswith("  ")]
    assert len(about) == len(lines) - 2
    starts = {len(re.match(r"  [^:]+: +", line)[0]) for line in about}  # type: ignore[index]
    assert len(starts) == 1
    origin = "measured here|reported by the system|published|given|computed|not known"
    assert all(re.search(origin, line) for line in about)


def test_a_gpu(tier: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch):
    chip = Chip("Apple M1 Max", "gpu", 32, 64, 400)
    monkeypatch.setattr(doctor, "this_chip", lambda: chip)
    monkeypatch.setattr(doctor, "gpu_limit", lambda: 48_000_000_000)
    sound = SelfTest([Check("a kernel", None)], 1)
    monkeypatch.setattr(doctor, "self_test", lambda progress: sound)
    monkeypatch.setattr(doctor, "products_gb_s", lambda: 320.0)
    every = run("doctor", tier, "--json").json
    found, model = every["machine"], values(every["model"])
    machine = values(found)
    assert machine["products_gb_s"] == 320 and found["products_gb_s"]["about"].startswith("80% of")
    by_published, by_measured = (1 / model[f"{by}tokens_per_s"] for by in ("", "measured_"))
    launches = 92 * 2e-6
    assert by_measured - launches == pytest.approx((by_published - launches) * 400 / 320)
    assert (machine["chip"], machine["gpu_cores"], machine["memory_gb"]) == ("Apple M1 Max", 32, 64)
    assert machine["bandwidth_gb_s"] == 400 and found["bandwidth_gb_s"]["source"] == "published"
    assert machine["gpu_limit_bytes"] == 48_000_000_000
    assert "1 launches of kernels against plain MLX" in found["self_test"]["about"]


def test_the_models_own_experts_are_read(tier: Path, large: Path, quick: list[Any]):
    """If they are large enough; else a file beside the model."""
    run("doctor", tier)
    assert quick == [tier.resolve().parent]
    run("doctor", large, "--quiet", code=None)
    pieces = quick[1]
    assert len(pieces) == 3 * 224 and all(isinstance(piece, Piece) for piece in pieces)
    # Gate and up have rows of 1024 bytes for 5120 trits, down of 2768 for 13824.
    assert {piece.nbytes for piece in pieces} == {13824 * 1024, 5120 * 2768}


# What is wrong


@pytest.mark.slow
def test_a_wrong_result(quick: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "measure_folder", lambda *_: DISK)
    real = mx.gather_qmm
    monkeypatch.setattr(mx, "gather_qmm", lambda *a, **k: real(*a, **k) + 1)
    done = run("doctor", code=1)
    assert re.search(r"self-test: +\d+ of \d+ results are right", done.out)
    assert done.err.startswith("error: 15 of 27 results are wrong on this machine: gather_qmm, 2")
    assert done.err.count("\n") == 1 and "do not use models here" in done.err
    found = run("doctor", "--json", code=1).json
    assert found["machine"]["self_test"]["value"]["right"] == 12
    assert found["problems"] == [done.err.removeprefix("error: ").strip()]


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ("0.1.5", "mlx 0.1.5 is older than 99.1, which was tested: pip install -U 'mlx>="),
        (None, "mlx is not installed: pip install 'mlx>=99.1,<100'"),
        ("99.1", None),
        ("99.2.1rc1", None),
        ("100.0.1", "mlx 100.0.1 is newer than what was tested: pip install -U 'mlx>=99.1,<100'"),
    ],
)
def test_versions(
    installed: str | None, problem: str | None, quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Version("mlx", installed, "99.1", "100"), Version("mlx-lm", "1.0", None)]
    monkeypatch.setattr(doctor, "installed_versions", lambda: found)
    done = run("doctor", code=0 if problem is None else 1)
    assert done.err == "" if problem is None else problem in done.err
    assert re.search(r"mlx-lm: +1\.0 \(reported by the system: .* not installed\)", done.out)


def test_what_was_tested_is_in_the_metadata(monkeypatch: pytest.MonkeyPatch):
    lines = ["numpy>=2", "mlx>=1.2.3; sys_platform == 'darwin'", "mlx-lm[a,b]>=4.5"]
    monkeypatch.setattr(versions, "requires", lambda name: lines)
    assert [one.tested for one in installed_versions()] == ["1.2.3", "4.5"]
    lines[1:] = ["mlx<1.3,>=1.2.3; sys_platform == 'darwin'", "mlx-lm[a,b]<5"]
    bounds = [(one.tested, one.below) for one in installed_versions()]
    assert bounds == [("1.2.3", "1.3"), (None, "5")]

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("requires", "version"):
        monkeypatch.setattr(versions, name, missing)
    found = installed_versions()
    assert found == [Version("mlx", None, None), Version("mlx-lm", None, None)]
    assert not any(one.is_old for one in found)
    assert Version("a", "1.10", "1.9").is_old is False and Version("a", "1.9", "1.10").is_old


def test_a_full_disk_is_told(quick: list[Any], monkeypatch: pytest.MonkeyPatch):
    """It is no fault of the machine."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    monkeypatch.setattr(doctor, "measure_folder", disk.measure_folder)
    done = run("doctor")
    assert re.search(r"disk: +not known: \.: 0 B free; .*--disk GB/s", done.out)


def test_a_folder_that_takes_no_file(quick: list[Any], monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", "./x")

    monkeypatch.setattr(doctor, "measure_folder", fails)
    assert re.search(r"disk: +not known: .*Read-only file system: '\./x'", run("doctor").out)


def test_a_disk_that_cannot_be_read(quick: list[Any], monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> Any:
        raise OutlierError("x.safetensors: cannot be read: Input/output error")

    monkeypatch.setattr(doctor, "measure_folder", fails)
    text = "the disk cannot be read: x.safetensors: cannot be read: Input/output error"
    done = run("doctor", code=1)
    assert done.err == f"error: {text}\n" and text in done.out


def test_ctrl_c(quick: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "measure_folder", disk.measure_folder)
    monkeypatch.setattr(disk, "_write", interrupted)
    done = run("doctor", code=130)
    assert done.err == "interrupted\n" and done.out == ""
    assert not list(tmp_path.iterdir())


# Another Mac


def test_all_in_memory(large: Path):
    """Nothing is measured: neither the disk nor this machine."""
    how = "--ram", 48, "--chip", "M2 Pro", "--disk", 3.5
    found = run("doctor", large, *how, "--json").json
    machine, model = values(found["machine"]), values(found["model"])
    assert machine == {
        "chip": "Apple M2 Pro",
        "bandwidth_gb_s": 200,
        "memory_gb": 48,
        "gpu_limit_bytes": 36 * 2**30,
        "disk_gb_s": 3.5,
    }
    assert sources(found["machine"]) == {
        "chip": "given",
        "bandwidth_gb_s": "published",
        "memory_gb": "given",
        "gpu_limit_bytes": "computed",
        "disk_gb_s": "given",
    }
    assert found["model"]["name"] == "outlier-14b" and model["experts"] == "resident"
    assert "missing_bytes_per_token" not in model and "resident_tokens_per_s" not in model
    # docs/sizes.md: 17.86 GB, of which an embedding is not read, and three quarters of 9.546.
    cache = 2 * 48 * 8 * 128 * 4096 * 2
    nbytes = 17.860e9 - 0.438e9 - 0.75 * 9.546e9 + cache
    assert model["bytes_per_token"] == pytest.approx(nbytes, rel=1e-4)
    launches = 48 * 20 + 28 * 3 + 6
    assert model["tokens_per_s"] == pytest.approx(1 / (nbytes / 200e9 + launches * 2e-6), rel=1e-4)
    assert model["prompt_tokens_per_s"] is None


def test_paged(large: Path):
    how = [
        "--ram",
        "18",
        "--chip",
        "M2",
        "--bandwidth",
        "200",
        "--prefill-step-size",
        "128",
        "--kv-bits",
        "4",
    ]
    how += ["--quantized-kv-start", "0"]
    found = run("doctor", large, *how, "--disk", 3, "--json").json
    model = values(found["model"])
    share = model["resident_share"]
    assert model["experts"] == "paged" and 0.25 <= share < 1
    assert 224 * share == pytest.approx(round(224 * share))
    missing = (1 - share) * 9.546e9 / 4
    assert model["missing_bytes_per_token"] == pytest.approx(missing, rel=1e-3)
    memory = model["bytes_per_token"] / 200e9
    hidden = memory * 3.344e9 / model["bytes_per_token"]  # shared FFNs, beside which disks read
    seconds = memory + 1050 * 2e-6 + missing / 3e9 - hidden
    assert model["tokens_per_s"] == pytest.approx(1 / seconds, rel=1e-3)
    assert model["resident_tokens_per_s"] == pytest.approx(1 / (memory + 1050 * 2e-6), rel=1e-6)
    assert model["prompt_tokens_per_s"] == pytest.approx(128 * 3e9 / (4 * missing), rel=1e-3)
    assert model["needed_bytes"] <= 0.75 * 18 * 2**30

    found = run("doctor", large, *how, "--json").json["model"]
    assert found["tokens_per_s"]["value"] is None
    assert found["tokens_per_s"]["about"] == "the disk's speed is not known: give --disk GB/s"
    assert found["resident_tokens_per_s"]["value"] == model["resident_tokens_per_s"]

    # A prompt is read in the steps that the plan has, which are shorter where memory is short.
    found = run("doctor", large, "--ram", 16, "--chip", "M2 Pro", "--disk", 3, "--json")
    short = values(found.json["model"])
    assert short["resident_share"] == 0.25
    assert short["prompt_tokens_per_s"] == pytest.approx(512 * 3e9 / (0.75 * 9.546e9), rel=1e-3)


@pytest.mark.parametrize(("context", "used"), [(300, 1.0), (2, 1 - 0.75**2), (1, 0.25)])
def test_a_prompt_is_no_longer_than_its_context(large: Path, context: int, used: float) -> None:
    how = "--ram", 16, "--chip", "M2 Pro", "--disk", 3, "--expert-memory", "30%"
    done = run("doctor", large, *how, "--context", context, "--json").json["model"]
    read = used * (1 - 67 / 224) * 9.546e9
    assert done["prompt_tokens_per_s"]["value"] == pytest.approx(context * 3e9 / read, rel=1e-3)
    tokens = f"{context} token{'s' * (context > 1)}"
    assert f"{tokens} at a time" in done["activations_bytes"]["about"]
    assert f"are read for {tokens};" in done["prompt_tokens_per_s"]["about"]


def test_memory_for_experts_is_given(large: Path):
    how = "--ram", 48, "--chip", "M2 Pro", "--disk", 3, "--json", "--expert-memory"
    for given, slots in (("50%", 112), ("5GB", 5_000_000_000 // 42_617_856)):
        model = values(run("doctor", large, *how, given).json["model"])
        assert model["experts"] == "paged" and 224 * model["resident_share"] == slots
        assert model["experts_bytes"] == pytest.approx(slots * 42.6e6, rel=1e-3)
    assert values(run("doctor", large, *how, "all").json["model"])["experts"] == "resident"
    assert_refused(run("doctor", large, *how, "1GB", code=1), "--expert-memory 2387MB")
    told = run("doctor", large, *how, "much", code=2).err
    assert told.startswith("error: --expert-memory: 'much' is no amount of memory")


def test_a_model_that_does_not_fit(large: Path):
    done = run("doctor", large, "--ram", 8, "--chip", "M2", code=1)
    assert "speed" in done.out  # what is known is told all the same
    assert done.err.startswith("error: outlier-14b needs ") and "What helps: " in done.err
    assert "a Mac with 8 GB gives 6.44 GB" in done.err and done.err.count("\n") == 1


def test_a_chip_that_is_not_known(large: Path):
    found = run("doctor", large, "--ram", 48, "--json").json
    assert found["machine"]["chip"]["value"] == "another Mac"
    why = "the chip is not known: give --chip or --bandwidth"
    assert found["machine"]["bandwidth_gb_s"] == {
        "value": None,
        "source": "not known",
        "about": why,
    }
    assert found["model"]["tokens_per_s"]["about"] == why
    known = run("doctor", large, "--ram", 48, "--bandwidth", 100, "--json").json
    assert sources(known["machine"])["bandwidth_gb_s"] == "given"
    slow, fast = (
        run("doctor", large, "--ram", 48, "--bandwidth", gb_s, "--json").json["model"]
        for gb_s in (100, 200)
    )
    times = [1 / found["tokens_per_s"]["value"] - 1050 * 2e-6 for found in (slow, fast)]
    assert times[0] == pytest.approx(2 * times[1])


def test_the_machine_alone():
    done = run("doctor", "--chip", "M3 Max 40")
    assert done.out.splitlines()[0] == "another Mac"
    assert re.search(r"memory bandwidth: +400 GB/s \(published", done.out)
    assert re.search(r"memory: +not known: give --ram", done.out)
    assert "mlx" not in done.out and "self-test" not in done.out


def test_bandwidth_of_this_gpu(quick: list[Any], monkeypatch: pytest.MonkeyPatch):
    """It stands for what is not published; the rest is found here. A CPU has no use for it."""
    assert Given(bandwidth_gb_s=100).elsewhere is not mx.metal.is_available()
    monkeypatch.setattr(doctor, "use_metal", lambda: True)
    monkeypatch.setattr(doctor, "this_chip", lambda: Chip("Apple M99", "gpu", 8, 16, note="?"))
    found = run("doctor", "--bandwidth", 250, "--json").json["machine"]
    assert values(found)["bandwidth_gb_s"] == 250 and sources(found)["bandwidth_gb_s"] == "given"
    assert found["chip"]["value"] == "Apple M99" and "self_test" in found


def test_a_model_whose_work_is_not_known(
    tier: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_model, "work_of", lambda *_: None)
    found = run("doctor", tier, "--json").json["model"]
    assert found["tokens_per_s"]["value"] is None
    assert "how large the model's KV cache is" in found["tokens_per_s"]["about"]
    assert found["needed_bytes"]["value"] > 0


# Wrong usage


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--disk 0", "--disk: 0 is less than 0.001"),
        ("--disk fast", "--disk: 'fast' is not a number"),
        ("--bandwidth -1", "--bandwidth: -1 is less than 0.001"),
        ("--ram 0", "--ram: 0 is less than 1"),
        ("--chip M2-Pro", "--chip: no chip 'M2-Pro' is known; known: M1, M1 Pro, M1 Max"),
        ("--chip M4-Max", "--chip: no chip"),
        ("./tier --chip M2", "--ram: the plan needs the memory of that Mac"),
        ("--context 0", "--context: 0 is less than 1"),
    ],
)
def test_wrong_usage(words: str, told: str):
    done = run("doctor", *words.split(), code=2)
    assert done.err.startswith(f"error: {told}") and done.out == ""


def test_the_model_in_either_spelling(quick: list[Any]):
    assert_refused(run("doctor", "--model", "./nothing", code=1), "nothing")
    told = run("doctor", "a", "--model", "b", code=2).err
    assert told.startswith("error: the model is given twice: as argument MODEL and by --model")


def test_no_such_model(quick: list[Any]):
    assert_refused(run("doctor", "./nothing", code=1), "nothing", "no such folder")
    assert quick == []


def test_an_overlay_is_no_model(overlay: Built, quick: list[Any]):
    done = run("doctor", overlay.path, "--quiet", code=1)
    assert_refused(done, "an overlay; `outlier-mlx convert` makes a tier from it")


def test_a_repository_need_not_be_there(
    tier: Path, tmp_path: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers are enough; the disk is that of the current folder."""
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    hub.add("someone/tier", tier)
    here = run("doctor", tier, "--ram", 16, "--json").json["model"]
    with opened(hub, tmp_path, monkeypatch):
        there = run("doctor", "someone/tier", "--ram", 16, "--json").json["model"]
        run("doctor", "someone/tier", "--json")
    assert there == here | {"name": "someone/tier"}
    assert quick == [Path()]
