"""What `import nnunet_ssl` offers: an encoder, a scan, what the encoder makes of it, and a segmentation."""
