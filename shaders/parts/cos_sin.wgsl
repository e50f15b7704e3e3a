// cos and sin together, to f32 rounding (9.1e-8) for |angle| <= 1e4; (1, 0) exactly for an angle of 0.
// WGSL promises its own only to 2^-11, and only inside [-pi, pi]: c^2 + s^2 would not be 1 and rotations would not keep lengths.
fn cos_sin(angle: f32) -> vec2<f32> {
  let quarter_turns = round(angle * 0.636619772);
  // pi/2 in three parts (Cody-Waite): the products with the first two are exact while quarter_turns < 2^13.
  let x = ((angle - quarter_turns * 1.5703125) - quarter_turns * 4.837512969970703125e-4) - quarter_turns * 7.549789948768648e-8;
  let x2 = x * x;
  let s = x + x * x2 * (-1.6666654611e-1 + x2 * (8.3321608736e-3 - x2 * 1.9515295891e-4));
  let c = 1.0 - 0.5 * x2 + x2 * x2 * (4.166664568298827e-2 + x2 * (-1.388731625493765e-3 + x2 * 2.443315711809948e-5));
  let quadrant = i32(quarter_turns) & 3;
  let swapped = select(vec2(c, s), vec2(s, c), (quadrant & 1) == 1);
  let cos_negative = quadrant == 1 || quadrant == 2;
  return select(swapped, -swapped, vec2(cos_negative, quadrant >= 2));
}

