"""What every other package stands on: errors, trees, keys, meshes, the device report."""
