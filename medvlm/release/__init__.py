"""What leaves the house: a model card from the lineage, a bundle with credit and bill of materials, a promotion."""
