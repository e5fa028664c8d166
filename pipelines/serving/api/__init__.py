"""The images API: its fields, requests, responses and errors."""
