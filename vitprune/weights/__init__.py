"""Methods that remove single weights of linear layers, one a file: a mask and, of most, weights that make up for it."""
