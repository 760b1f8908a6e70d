"""The same search, driven by a client over HTTP: the architecture of the original ETS and REBASE, as a baseline.

Two stock sglang servers (policy model, PRM), a sentence encoder for the clusters and PuLP with CBC for the integer program, one
thread a problem. The search itself (levels, allocation, widths, answers) is the pure core of `sglang_ets`, so that both
sides of a comparison follow the same policy and differ in where the loop runs.

    wire.py      what goes over HTTP and how an answer is read; pure
    servers.py   one pool of connections to one server
    encoder.py   texts -> sentence embeddings
    choose.py    the published selection on the client's own account of KV
    driver.py    one problem from its prompt to its answer, with the time each part takes
    processes.py, table.py    for `bench/throughput.py`: servers started, frozen and timed; tables
"""
