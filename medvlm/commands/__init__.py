"""One module a `medvlm` verb: options in, one library call, a readable answer out."""
