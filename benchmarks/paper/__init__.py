"""The experiments of the SPM paper (arXiv 2512.23905): networks trained from scratch, dense against SPM.

    W="wikitext-2-test.txt wikitext-2-valid.txt"
    python -m benchmarks.paper compositional --json results/compositional.json
    python -m benchmarks.paper classification --data $W --json results/classification.json
    python -m benchmarks.paper shakespeare --data tiny-shakespeare.txt --json results/shakespeare.json

Settings are in one TOML file an experiment, beside this one. Every network is trained with four kinds of layers: dense;
dense at the largest hidden width with no more parameters than SPM; SPM general; SPM rotation, one pass of stages each.
Each has its own small grid of learning rates, of which the first seed's validation rows choose.

What is held against the results is the paper's abstract. Its tables, widths, batch sizes and steps were not at hand, so
these are experiments of the same kind and not the same experiments, and no number of the paper is repeated here.

Compositional teachers, accuracy minus that of dense, mean and standard deviation of three seeds, and dense time divided by
SPM time for a step of 256 rows on one thread of a busy AMD EPYC (``results/paper-compositional-2026-11-21.json``):

    width  teacher   rows a coordinate  SPM general     SPM rotation    dense, equal size  dense/SPM time
    64     pairwise  64                 +0.025 ± 0.022  -0.013 ± 0.012  -0.020 ± 0.007     0.34
    64     shuffled  64                 -0.030 ± 0.009  -0.031 ± 0.005  -0.016 ± 0.004
    64     dense     64                 -0.038 ± 0.008  -0.026 ± 0.013  -0.012 ± 0.008
    64     pairwise  16                 -0.077 ± 0.022  -0.057 ± 0.010  -0.018 ± 0.014
    256    pairwise  64                 +0.011 ± 0.010  -0.020 ± 0.009  -0.009 ± 0.001     0.48
    256    shuffled  64                 -0.031 ± 0.006  -0.022 ± 0.006  -0.002 ± 0.011
    256    dense     64                 -0.043 ± 0.009  -0.032 ± 0.009  -0.010 ± 0.006
    256    pairwise  16                 -0.081 ± 0.021  -0.087 ± 0.012  -0.028 ± 0.003
    1024   not trained                                                                     1.83
    2048   not trained                                                                     3.76

The claim of better accuracy on structured tasks holds where the teacher has the student's own pairings and rows are plenty,
for the general variant, with a ninth of the parameters at width 256. It does not hold once the inputs are shuffled, and
with few rows SPM generalises worse than dense, not better. The claim of speed holds from a width between 256 and 1024 on. A
narrower dense network of equal size is never behind by more than 0.028 and is faster than SPM at every width.
The rate 3e-2 that SPM general mostly chose is the grid's highest; in a trial at width 256, 1e-1 was no better.

Text classification, accuracy of the same kind of networks on sentences of WikiText articles, 6587 of them with 20 labels, a
stand-in for AG News; mean and standard deviation of three seeds (``results/paper-classification-2026-11-21.json``):

    width  dense          dense, equal size  SPM general    SPM rotation   dense/SPM time (general)
    256    0.534 ± 0.002  0.518 ± 0.016      0.454 ± 0.011  0.500 ± 0.002  0.50
    1024   0.704 ± 0.006  0.682 ± 0.003      0.579 ± 0.021  0.669 ± 0.004  2.18
    2048   not trained                                                     2.90

Here the claim of competitive accuracy does not hold: both variants are behind dense, and behind the narrower dense network.
At width 1024 SPM general chose the lower end of its grid, 3e-3; lower rates were not tried. The machine was so busy that
these step times say no more than which of two is faster.

Of Shakespeare no run has been recorded yet.
"""
