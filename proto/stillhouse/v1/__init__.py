"""Generated code of the contract (`scripts/generate_protos.sh`). Never edited by hand."""
