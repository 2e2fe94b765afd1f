"""`python -m outlier_mlx` is `outlier-mlx`."""

from outlier_mlx.cli import main

if __name__ == "__main__":
    main()
