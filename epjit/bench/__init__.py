"""Times of the operations beside the link ceiling; `python -m epjit bench` and `tune` run it."""
