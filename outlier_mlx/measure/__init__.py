"""What a model does and costs. Each command has a module, or a few whose names begin alike.

- `perplexity`: `perplexity`; `measured` keeps the results in a tier, for its card.
- `routing`: `routing`; `expert_recorder` makes an `expert_trace`.
- `tune`: `tuning` trains what `tuned_parts` finds in a tier; `quantized_gradients` saves memory.
- `bench`: `bench` times a model, `bench_settings` compares settings of MLX, `bench_kernels` times
  the kernels of the table in `bench_cases`, on `bench_inputs`, into `bench_results`. A trace is
  replayed by `replay_run`, with `replay` and `replay_speed`, and shown by `replay_report`.
- `doctor`: `doctor` examines a machine, `doctor_model` a model there, into `findings`: `versions`
  of libraries, the `disk`, and `checked_results`.
- `eval`: `eval_harness` runs the tasks of `eval_tasks` on an `eval_model`, into `eval_results`.
- `compare`: `eval_charts` joins results, `eval_draw` draws them.
- `outliers`: `outlier_run` measures models by `outliers`: the inputs of blocks are read at
  `outlier_probes`, counted in `outlier_counts` and `outlier_experts`, judged by
  `outlier_definitions`, and written by `outlier_report`. `outlier_parameters` counts parameters,
  over which `outlier_draw` draws what was measured and what is in `outlier_published`.

`expected` has the formula of a model's speed, with `speeds` of this machine. `alphas` are those of
`--alpha`. The modules `*_tables` print on the terminal. `environment` is shared by what measures,
`pictures` and `labels` by what draws.
"""
