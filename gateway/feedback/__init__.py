"""Feedback on answers, and a bounded log of the calls that it is about."""
