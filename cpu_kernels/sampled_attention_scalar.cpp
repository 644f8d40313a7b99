// The kernels for any CPU: the slow twin of every ISA.
#include <math.h>
#include <string.h>

#include "elements.h"
#include "kernels.h"

namespace magicpig::portable {
namespace {
#include "sampled_attention.inl"
#include "signature_encode.inl"
#include "signature_scan.inl"
}  // namespace

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

}  // namespace magicpig::portable
