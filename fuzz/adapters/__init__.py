"""Other people's kernels as targets: each file says what differs from the contract, in about 15 lines."""
