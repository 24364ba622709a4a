"""The made-up catalogue and the small model that come with the project."""
