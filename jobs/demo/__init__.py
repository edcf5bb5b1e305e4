"""The demo: job files, pictures and a script that run the whole way offline."""
