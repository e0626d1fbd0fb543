"""Smaller copies of the images of a data set, made once: python -m fastsmooth.prepare"""
