"""The gateway: what every request passes before its route sees it, and what a server can bear of its clients."""
