"""The emoji of Unicode as a data set: images, names, and keywords from public lists."""
