"""Labelled images: sources, folders, splits and augmentation."""
