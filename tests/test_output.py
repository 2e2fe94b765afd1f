import errno
import os
import stat

import pytest

from outlier_mlx.errors import CheckpointWarning, OutlierError
from outlier_mlx.storage.output import check_writable, whole_file, write_json, write_whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_ends_early_leaves_the_former_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("half")
        assert path.read_text() == "before"
        raise error
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match="No space left") as caught, whole_file(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_interrupted_before_the_file_is_yielded(tmp_path, monkeypatch):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("outlier_mlx.storage.output.os.close", interrupted)
        with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.json"):
            pass
    assert not list(tmp_path.iterdir())


def test_the_temporary_name_ends_as_the_files_and_is_never_too_long(tmp_path):
    path = tmp_path / ("ä" * 120 + ".safetensors")
    with whole_file(path) as part:
        assert part.parent == tmp_path
        assert part.name.startswith(".") and part.suffix == ".safetensors"
    assert path.read_bytes() == b""


def test_files_are_as_readable_as_any_other_or_private(tmp_path):
    old = os.umask(0o027)
    try:
        write_whole(tmp_path / "shared", b"")
        write_whole(tmp_path / "private", b"", private=True)
    finally:
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("shared", "private")]
    assert modes == [0o640, 0o600]


def test_json_holds_no_nan_and_text_no_half_character(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "a.json", {"name": "größer"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "name": "größer"\n}\n'.encode()
    write_whole(tmp_path / "a.txt", "\ud83d")
    assert (tmp_path / "a.txt").read_bytes() == b"?"


def test_outputs_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "out.json"
    check_writable(path, force=False)
    path.write_text("")
    check_writable(path, force=True)
    for wrong, force, message in (
        (path, False, "--force"),
        (tmp_path, True, "is a folder"),
        (tmp_path / "none" / "a", False, "no such folder"),
    ):
        with pytest.raises(OutlierError, match=message):
            check_writable(wrong, force=force)


def test_what_a_killed_run_left_of_a_file_is_named(tmp_path):
    path = tmp_path / "a b.json"
    for name in (".a b.0a1b2c3d.json", ".a b.0a1b2c3d.txt", ".a b.0a1b2c3.json", ".0a1b2c3d.json"):
        (tmp_path / name).write_text("")
    with pytest.warns(CheckpointWarning) as told:
        check_writable(path, force=False)
    (line,) = (str(warning.message) for warning in told)
    assert line.startswith(f"{path}: .a b.0a1b2c3d.json was left beside it")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_gone_is_an_error_of_the_system(tmp_path):
    path = tmp_path / "none" / "a"
    with pytest.raises(OSError) as caught:
        write_whole(path, b"")
    assert caught.value.filename == str(path)  # not the temporary file
