"""How layers are scored and chosen."""
