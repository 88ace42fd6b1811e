"""Benchmarks: cell -> arrays -> verdict -> time -> record -> page. A cell that fails its verdict has no number."""
