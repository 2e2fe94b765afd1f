"""Tables that show the result of a merge on the terminal."""

from outlier_mlx.errors import listed, one_line
from outlier_mlx.merge.gates import CONDITION_LIMIT
from outlier_mlx.merge.report import Merged, conditions, kind_of
from outlier_mlx.merge.routes import Routing
from outlier_mlx.terminal import Output, count, parts_table, print_columns, print_heading, stderr


def print_merged(result: Merged) -> None:
    """Print sizes, routing, notes and the output folder to stderr."""
    console = stderr()
    mixture, stored_as, routers = result.mixture, result.stored_as, result.routers
    stored = f"{stored_as.bits} bits" if stored_as.bits else stored_as.dtype
    print_heading(console, result.path.name, f": {kind_of(result.mixture)}, {stored}")
    console.print(parts_table(result.rows))
    console.print(
        f"parameters: {count(mixture.parameters.total)} in total,"
        f" {count(mixture.parameters.active)} active per token",
        soft_wrap=True,
    )
    if routers.routing:
        _print_modes(console, result)
        _print_layers(console, routers.routing[0], conditions(result))
    for note in result.notes:
        console.print(one_line(f"note: {note}"), soft_wrap=True)
    if result.unquantized:
        names = listed(result.unquantized, 1)
        console.print(
            f"not quantized because no group size divides their width: {names}", soft_wrap=True
        )
    console.print(one_line(f"wrote {result.path}"), soft_wrap=True)


def _print_modes(console: Output, result: Merged) -> None:
    """Print how well each gate mode routes."""
    routers, experts = result.routers, len(result.mixture.experts)
    texts = "held-out prompts" if routers.measured_on == "held_out" else "the positive prompts"
    heads = ("gate_mode", "tokens,\n%", "weight,\n%", "prompts")
    rows = [
        (
            routing.mode,
            f"{100 * routing.right:.1f}",
            f"{100 * routing.weight:.1f}",
            f"{routing.prompts_right}/{routing.prompts}",
        )
        for routing in routers.routing
    ]
    chance = f"{100 / experts:.1f}"
    console.print()
    print_heading(console, "Routing", f" of {texts} to the right expert of {experts}")
    print_columns(console, heads, [*rows, ("chance", chance, chance, "")])


def _print_layers(console: Output, routing: Routing, numbers: list[float | None]) -> None:
    """Print each expert's share of the tokens in each layer, for the configuration's mode."""
    experts = [str(expert) for expert in range(len(routing.layers[0].first))]
    heads = ("layer", "condition\nnumber", "largest\nweight, %", *experts)
    rows = [
        (
            str(number),
            _condition(condition),
            f"{100 * layer.largest:.0f}",
            *(f"{100 * share:.0f}" for share in layer.first),
        )
        for number, (layer, condition) in enumerate(zip(routing.layers, numbers, strict=True))
    ]
    tokens = f"{routing.tokens} token{'' if routing.tokens == 1 else 's'}"
    title = f": share of {tokens} for which each expert has the largest weight, %"
    console.print()
    print_heading(console, routing.mode, title)
    print_columns(console, heads, rows, left=0)


def _condition(number: float | None) -> str:
    if number is None:
        return "-"
    mark = "!" if number > CONDITION_LIMIT else ""
    return (f"{number:.2f}" if number < 1e6 else "singular") + mark
