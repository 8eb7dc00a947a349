"""What is followed, switched, cut, verified and reported while a model trains."""
