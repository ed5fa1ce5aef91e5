"""The experiments of the SPM paper (arXiv 2512.23905): networks trained from scratch, dense against SPM.

    python -m benchmarks.paper compositional --json results/compositional.json
    python -m benchmarks.paper classification --data wikitext-2-test.txt wikitext-2-valid.txt --json results/classification.json
    python -m benchmarks.paper shakespeare --data tiny-shakespeare.txt --json results/shakespeare.json

Settings are in one TOML file an experiment, beside this one. Every network is trained dense, dense at a smaller hidden width
with no more parameters than SPM, SPM general and SPM rotation, one pass of stages each.
"""
