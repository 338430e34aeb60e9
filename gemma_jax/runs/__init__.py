"""A run from its config to its adapter.

prepare              everything a run is made of
train                its loop; `batched` trains many adapters at once
evaluate             held-out losses; `evaluate_adapters` compares adapters
resume               whether it may continue in a workdir
workdir, checkpoint  what a run leaves behind, with its `checksums`
verify               checks these, and repeats the arithmetic
metrics, guards      what it logs, and which numbers stop it
hosts                what several processes agree on
dry_run, summary     what a run would do, what it trains
describe             what decides its result
"""
