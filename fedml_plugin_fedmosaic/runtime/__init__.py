"""The loop that puts strategies, engines and communicators together."""
