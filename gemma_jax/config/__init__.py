"""Typed configuration, checked in one place."""
