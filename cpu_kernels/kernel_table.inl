// The kernels of an ISA, in its namespace behind their .inl files.

const Kernels kernels = {hash,
                         pack_codes,
                         log_u,
                         match_segment,
                         match_tiles,
                         list_tokens,
                         attend,
                         encode_signatures,
                         signature_tables,
                         row_products,
                         signature_scores,
                         sum_of_powers,
                         squares_of_scores,
                         shrink_scores,
                         signature_scan,
                         signature_choose};
