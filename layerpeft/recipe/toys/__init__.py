"""Small rows, pictures, sounds and models that are made by a seed where they are first used, and kept in the user's caches."""
