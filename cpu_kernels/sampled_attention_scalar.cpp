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

#include "kernel_table.inl"

}  // namespace magicpig::portable
