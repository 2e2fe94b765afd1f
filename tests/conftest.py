"""Fixtures for every test."""

pytest_plugins = ["kernels.emulator.pytest_plugin"]
