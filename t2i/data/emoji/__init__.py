"""The emoji of Unicode as a data set: pictures, names, and keywords from public lists."""
