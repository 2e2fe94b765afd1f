"""Print how many launches a decoding step is: of a tier, and of mlx-lm's Qwen2-MoE of its shape.

They are counted from MLX's graph (kernels/launch_counts.py): no GPU is needed, and no weights.
"""

import argparse
from dataclasses import fields

from kernels.launch_counts import Shape, table


def main() -> None:
    """Print one table for the shape that is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Shape):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=field.default, help="default: %(default)s")
    print(table([Shape(**vars(parser.parse_args()))]))


if __name__ == "__main__":
    main()
