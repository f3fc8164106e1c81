"""One question about very many pictures: rows in, a line of JSON each out, to be gone on with."""
