//! OCI images: archives, manifests, configs, and the unpacking of layers.
