"""Ways to score layers; one file each, the file name is the value of `by`.

A scorer holds a frozen `Options` dataclass and `needs(options)`, which is one of

- `"nothing"` or `"weights"`: it also has `score(request, options) -> Measured`;
- `"forward"` or `"backward"`: it also has `start(request, options) -> Measurement`, which watches batches go through the
  model (a forward pass, or a forward and backward pass each) and then gives its `result()`.

`request` is a `layerpeft.Request`.
"""
