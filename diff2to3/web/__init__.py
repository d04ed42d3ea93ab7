"""Pages: a viewer that is one file, and a web app around the generator."""
