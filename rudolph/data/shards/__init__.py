"""Pairs packed into shards: Arrow files with texts and encoded images, read at random."""
