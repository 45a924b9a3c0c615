// The points, drawn by WebGL 2: three small buffers, six to eight bytes a point, whatever their number.
//
// While the map moves, only as many points are drawn as the machine manages at a good rate: the first ones, which are a fair
// sample. When it rests, all of them are drawn piece by piece into a second buffer, which is then shown.

import { createBufferInfoFromArrays, createFramebufferInfo, createProgramInfo, createTexture, createVertexArrayInfo,
         drawBufferInfo, resizeFramebufferInfo, setAttribInfoBufferFromArray, setTextureFromArray, setUniforms } from "./vendor/libraries.js";

const VERTEX = `#version 300 es
in vec2 point;
in float colour;
in float state;
uniform vec2 scale, offset;
uniform float size, alpha;
uniform vec4 veil; // colour of the background, and how much of it lies over points that are not chosen
uniform sampler2D colours;
out vec4 shade;
void main() {
  shade = vec4(0);
  gl_PointSize = size;
  gl_Position = vec4(2, 2, 0, 1);
  bool chosen = state > 1.5;
  if (state > .5 && !chosen) return;
  gl_Position = vec4(point * scale + offset, 0, 1);
  vec3 own = texelFetch(colours, ivec2(int(colour + .5), 0), 0).rgb;
  shade = vec4(chosen ? own : mix(own, veil.rgb, veil.a), 1) * alpha;
}`;

const FRAGMENT = `#version 300 es
precision highp float;
in vec4 shade;
uniform float size;
out vec4 pixel;
void main() {
  float edge = 1.;
  if (size > 3.) edge = 1. - smoothstep(1. - 3. / size, 1., 2. * length(gl_PointCoord - .5));
  pixel = shade * edge;
}`;

const RATE_MS = 33; // a frame of a map that moves should take no longer
const PIECES = 12; // in which a map that rests is drawn, at most
const VEIL = 0.78;
const MOVES_MS = 160; // after the last movement a map rests
const LEAST = 30_000; // points that are always drawn
const FEW = 3000; // selected points that are drawn larger
const FILL = 0.4; // share of its square that a map covers, about

export class Points {
  /** Draws on a canvas; throws where there is no WebGL 2. */
  constructor(canvas) {
    this.canvas = canvas;
    const gl = canvas.getContext("webgl2", { antialias: false, preserveDrawingBuffer: true, powerPreference: "high-performance" });
    if (!gl) throw new Error("This browser draws no WebGL 2; switch on hardware acceleration, or try another browser.");
    this.gl = gl;
    this.program = createProgramInfo(gl, [VERTEX, FRAGMENT]);
    this.colours = createTexture(gl, { src: new Uint8Array(1024), width: 256, height: 1, min: gl.NEAREST, mag: gl.NEAREST });
    this.count = 0;
    this.chosen = 0; // points that are selected
    this.budget = 400_000; // points of a frame while the map moves
    this.paper = [0, 0, 0];
    this.view = { scale: [1, 1], offset: [0, 0], zoom: 1 };
    this.moved = 0;
    this.moves = false; // since the last frame
    this.done = 0; // points in the second buffer
    this.frame = 0;
    this.last = 0;
  }

  setPoints(points) {
    const gl = this.gl;
    this.count = points.length / 2;
    const bytes = () => new Uint8Array(this.count);
    this.buffers = createBufferInfoFromArrays(gl, {
      point: { data: points, numComponents: 2, type: Uint16Array, normalize: true },
      colour: { data: bytes(), numComponents: 1, normalize: false },
      state: { data: bytes(), numComponents: 1, normalize: false },
    });
    this.array = createVertexArrayInfo(gl, this.program, this.buffers);
    this.invalidate();
  }

  /** `codes`: places in the palette by point; `table`: its [256 * 4] bytes; `paper`: red, green, blue of the background. */
  setColours(codes, table, paper) {
    this.paper = paper.map((value) => value / 255);
    setAttribInfoBufferFromArray(this.gl, this.buffers.attribs.colour, codes);
    setTextureFromArray(this.gl, this.colours, table, { width: 256, height: 1 });
    this.invalidate();
  }

  /** `selected`: numbers that are drawn above all others; null where everything is alike. */
  setState(state, selected) {
    const gl = this.gl;
    setAttribInfoBufferFromArray(gl, this.buffers.attribs.state, state);
    this.indices ??= gl.createBuffer();
    gl.bindVertexArray(null);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.indices);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, selected ?? new Uint32Array(0), gl.STATIC_DRAW);
    this.chosen = selected?.length ?? 0;
    this.dimmed = selected !== null;
    this.invalidate();
  }

  /** `scale`, `offset`: from places in the map, 0 to 1, to the canvas, -1 to 1; `moving`: another one follows soon. */
  setView(view, moving) {
    this.view = view;
    if (moving) {
      this.moved = performance.now();
      this.moves = true;
    }
    this.invalidate();
  }

  resize(width, height, ratio) {
    this.ratio = ratio;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const attachments = [{ format: this.gl.RGBA, min: this.gl.NEAREST }];
    if (this.second) resizeFramebufferInfo(this.gl, this.second, attachments);
    else this.second = createFramebufferInfo(this.gl, attachments);
    this.invalidate();
  }

  invalidate() {
    this.done = 0;
    this.frame ||= requestAnimationFrame((now) => this.#draw(now));
  }

  #draw(now) {
    this.frame = 0;
    if (!this.count || !this.second) return;
    const gl = this.gl;
    // A frame may take longer than that: what has moved since the last one moves, whenever that was.
    const moving = this.moves || performance.now() - this.moved < MOVES_MS;
    this.moves = false;
    if (moving) {
      if (this.last) this.#adapt(now - this.last);
      this.last = now;
      gl.bindFramebuffer(gl.FRAMEBUFFER, null);
      const drawn = Math.min(this.budget, this.count);
      this.#begin();
      this.#points(0, drawn, drawn);
      this.#top(drawn, this.budget);
      this.frame = requestAnimationFrame((next) => this.#draw(next));
      return;
    }
    this.last = 0;
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.second.framebuffer);
    if (!this.done) this.#begin();
    else gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    const end = Math.min(this.count, this.done + Math.max(this.budget, Math.ceil(this.count / PIECES)));
    this.#points(this.done, end, this.count);
    this.done = end;
    if (end < this.count) {
      this.frame = requestAnimationFrame((next) => this.#draw(next));
      return;
    }
    this.#top(this.count, this.chosen);
    const { width, height } = this.canvas;
    gl.bindFramebuffer(gl.READ_FRAMEBUFFER, this.second.framebuffer);
    gl.bindFramebuffer(gl.DRAW_FRAMEBUFFER, null);
    gl.blitFramebuffer(0, 0, width, height, 0, 0, width, height, gl.COLOR_BUFFER_BIT, gl.NEAREST);
    this.canvas.dispatchEvent(new Event("drawn"));
  }

  /** More points where frames come quickly, fewer where they do not. */
  #adapt(took) {
    const wanted = this.budget * Math.min(Math.max(RATE_MS / took, 0.3), 1.15);
    this.budget = Math.round(Math.min(Math.max(wanted, LEAST), Math.max(this.count, LEAST)));
  }

  #begin() {
    const gl = this.gl;
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
  }

  /** Size in device pixels, and opacity such that the map is neither empty nor a blot. */
  #look(of) {
    const { zoom } = this.view;
    const square = Math.min(this.canvas.width, this.canvas.height) ** 2;
    const size = Math.min(Math.max(0.9 * Math.sqrt((FILL * square) / of), 1.25 * this.ratio), 5.5 * this.ratio) * zoom ** 0.4;
    const covered = (of * size * size) / (FILL * square * zoom * zoom);
    return { size: Math.min(size, 16 * this.ratio), alpha: Math.min(0.9, Math.max(0.05, 1.4 / covered)) };
  }

  #use({ size, alpha }) {
    const gl = this.gl;
    gl.useProgram(this.program.program);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    const { scale, offset } = this.view;
    const veil = [...this.paper, this.dimmed ? VEIL : 0];
    setUniforms(this.program, { scale, offset, size, alpha, veil, colours: this.colours });
    gl.bindVertexArray(this.array.vertexArrayObject);
  }

  #points(start, end, of) {
    this.#use(this.#look(of));
    drawBufferInfo(this.gl, this.array, this.gl.POINTS, end - start, start);
  }

  /** What is selected, again and above the rest: few of them large and opaque, many like the others. */
  #top(of, most) {
    const drawn = Math.min(this.chosen, most);
    if (!drawn) return;
    const { size, alpha } = this.#look(of);
    const few = drawn < FEW;
    this.#use({ size: few ? Math.max(1.25 * size, 3 * this.ratio) : size, alpha: few ? 0.9 : Math.min(0.9, 3 * alpha) });
    const gl = this.gl;
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.indices);
    gl.drawElements(gl.POINTS, drawn, gl.UNSIGNED_INT, 0);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, null);
  }
}
