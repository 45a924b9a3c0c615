// What the page uses of libraries by others; `npm ci && npm run build` here makes libraries.js of it.

export { createBufferInfoFromArrays, createFramebufferInfo, createProgramInfo, createTexture, createVertexArrayInfo, drawBufferInfo,
         resizeFramebufferInfo, setAttribInfoBufferFromArray, setTextureFromArray, setUniforms } from "twgl.js";
export { interpolateViridis, schemeObservable10, schemeTableau10 } from "d3-scale-chromatic";
export { select } from "d3-selection";
export { zoom, zoomIdentity } from "d3-zoom";
