"""Explicit smoothing and explicit graduated optimization of known functions: python -m
fastsmooth.smooth"""
