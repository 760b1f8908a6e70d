"""What a machine with a GPU is for: a rehearsal within ten minutes, on a machine that has torch, Triton and no package index.

prepare.py    gathers the wheels that such a machine lacks, where there is an index
rehearse.py   there: kernels, servers, throughput, a large model; each part writes rows, and a failure stops nothing
decode.py     decode attention of `ets_tree` against sglang's, a part of it
stand_in/     imports of `sgl_kernel`, whose wheel is built for another torch
"""
