// The Metal standard library, as far as compute kernels use it.
#pragma once
#include "msl/types.h"
#include "msl/traits.h"
#include "msl/math.h"
#include "msl/simd.h"
#include "msl/atomic.h"
#include "msl/matrix.h"
#include "msl/internal.h"
