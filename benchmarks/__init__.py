"""Ratios against what a user would pick instead, measured side by side in one run; never a timed test."""
