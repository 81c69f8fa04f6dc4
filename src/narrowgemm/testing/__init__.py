"""What tests, `narrowgemm bench`, `doctor` and users check and time products with. Nothing here is imported by a product.

    numerics                     the two gates on a result, and `calc_diff`
    cases, suites, suite_table   every suite: its cases, its peers, what it measures; `models`: the shapes they are made of
    case, inputs, values, guard  one case: its sizes, its tensors, poison and guard bytes around what is written
    layer, step, tokens          cases that are a whole expert layer, a training step, a product from BF16 tokens on
    timers                       times on a device, and the floor of a streaming read
    runner, worker, results      `bench`: cases in processes of their own, and the schema of result files
    peers, *_peers, peer         other libraries on the same case; inert until asked for
    selftest, selftest_steps     every kernel against the reference: `narrowgemm doctor`
    fuzz, fuzz_*                 random calls that no suite lists: `python -m narrowgemm.testing.fuzz cuda 60`
    folding                      how much of an MXFP8 tensor folds into E4M3
    stub_driver                  a CUDA driver that launches nothing
"""
