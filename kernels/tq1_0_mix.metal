// y = shared + sum over a token's experts of weight * product, with the same bits as tq1_0_down.
//
//   products (tokens * k, N)         float, the products of down with h: see tq1_0_qmv
//   weights  (tokens, k)             float
//   shared   (tokens, N)             T
//   y        (tokens, N)             T
//
// Grid: x over N; y over tokens.

const uint n = thread_position_in_grid.x, token = thread_position_in_grid.y;
const uint k = weights_shape[1];
float routed = 0.0f;
for (uint pair = token * k; pair < (token + 1) * k; pair++) {
  routed = fma(weights[pair], products[pair * N + n], routed);
}
y[token * N + n] = T(float(shared[token * N + n]) + routed);
