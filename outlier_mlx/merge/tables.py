"""What the terminal shows of a merge."""

from outlier_mlx.errors import one_line
from outlier_mlx.merge.gates import CONDITION_LIMIT
from outlier_mlx.merge.report import Merged
from outlier_mlx.merge.routes import Routing
from outlier_mlx.terminal import count, parts_table, plain_table, stderr


def print_merged(result: Merged) -> None:
    """Sizes, how tokens are routed, what is odd, and where the model is; on stderr."""
    console = stderr()
    mixture, form, routers = result.mixture, result.form, result.routers
    stored = f"{form.bits} bits" if form.bits else form.dtype
    console.print(
        parts_table(result.rows, one_line(f"{result.path.name}: {_kind(result)}, {stored}"))
    )
    console.print(
        f"parameters: {count(mixture.total_params)}, of which a token uses"
        f" {count(mixture.active_params)}",
        soft_wrap=True,
    )
    if routers.routing:
        console.print(_modes(result))
        console.print(_layers(routers.routing[0], routers.gates.condition_numbers))
    for note in result.notes:
        console.print(one_line(f"note: {note}"), soft_wrap=True)
    if result.unquantized:
        console.print(
            one_line(
                f"unquantized, since no group size divides their width: {result.unquantized[0]}"
                f" and {len(result.unquantized) - 1} more"
            ),
            soft_wrap=True,
        )
    console.print(one_line(f"wrote {result.path}"), soft_wrap=True)


def _kind(result: Merged) -> str:
    mixture = result.mixture
    name = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2-MoE"}[mixture.architecture]
    return f"{name} of {len(mixture.experts)} experts, {mixture.top_k} a token"


def _modes(result: Merged):  # type: ignore[no-untyped-def]
    """How well each mode routes."""
    routers, experts = result.routers, len(result.mixture.experts)
    texts = {"held_out": "held-out prompts", "positive_prompts": "the positive prompts themselves"}
    table = plain_table(
        f"Routing of {texts[routers.measured_on or 'held_out']} to the right one of {experts}"
    )
    table.add_column("gate_mode", no_wrap=True)
    for name in ("tokens,\n%", "weight,\n%", "prompts"):
        table.add_column(name, justify="right", no_wrap=True)
    for routing in routers.routing:
        table.add_row(
            routing.mode,
            f"{100 * routing.right:.1f}",
            f"{100 * routing.weight:.1f}",
            f"{routing.prompts_right}/{routing.prompts}",
        )
    chance = f"{100 / experts:.1f}"
    table.add_row("chance", chance, chance, "")
    return table


def _layers(routing: Routing, conditions: list[float]):  # type: ignore[no-untyped-def]
    """Which experts serve in each layer, under the recipe's own mode."""
    table = plain_table(
        f"{routing.mode}: mean weight of each expert, %, over {routing.tokens} tokens"
    )
    table.add_column("layer", justify="right")
    table.add_column("condition", justify="right", no_wrap=True)
    for expert in range(len(routing.layers[0].weight)):
        table.add_column(str(expert), justify="right", no_wrap=True)
    for number, (layer, condition) in enumerate(zip(routing.layers, conditions, strict=True)):
        shown = f"{condition:.2f}" if condition < 1e6 else "singular"
        weights = [f"{100 * weight:.0f}" for weight in layer.weight]
        mark = "!" if condition > CONDITION_LIMIT else ""
        table.add_row(str(number), shown + mark, *weights)
    return table
