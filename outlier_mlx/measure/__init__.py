"""What a model does and costs. Each command has a module, or a few whose names begin alike.

- `perplexity`: `perplexity`; `measured` keeps the results in a tier, for its card.
- `routing`: `routing`.
- `tune`: `tuning` trains what `tuned_parts` finds in a tier; `alphas` are those of `--alpha`.
- `bench`: `bench` times a model, `bench_settings` compares settings of MLX, `bench_kernels` times
  the kernels of the table in `bench_cases`, on `bench_inputs`, into `bench_results`.
- `eval`: `eval_harness` runs the tasks of `eval_tasks` on an `eval_model`, into `eval_results`.
- `compare`: `eval_charts` joins results, `eval_draw` draws them.
- `outliers`: `outlier_run` measures models by `outliers`: the inputs of blocks are read at
  `outlier_probes`, counted in `outlier_counts`, judged by `outlier_definitions`, and written by
  `outlier_report`.

The modules `*_tables` print on the terminal. `environment` and `calls` are shared by what measures,
`pictures` and `labels` by what draws.
"""
