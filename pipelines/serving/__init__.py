"""The server of `t2i serve`: pipelines that draw for many people at once, and the images API on top of them."""
