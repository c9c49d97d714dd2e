// Chapter 1: any picture with fewer bits. What each of the 256 values becomes is a table.
{
  const LARGEST = 1200; // Pixels along the longer side; larger pictures are made smaller.
  const bits = $("bits");
  const news = $("picture-news");
  let picture = builtIn();

  function builtIn() {
    const { width, height, pixels } = data.painting;
    const bytes = atob(pixels);
    const image = new ImageData(width, height);
    for (let from = 0, to = 0; from < bytes.length; from += 3, to += 4) {
      for (let color = 0; color < 3; color++) image.data[to + color] = bytes.charCodeAt(from + color);
      image.data[to + 3] = 255;
    }
    return image;
  }

  function paint(id, image) {
    const canvas = $(id);
    canvas.width = image.width;
    canvas.height = image.height;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function withFewerBits(image, grays) {
    const result = new ImageData(new Uint8ClampedArray(image.data), image.width, image.height);
    for (let k = 0; k < result.data.length; k++) if (k % 4 !== 3) result.data[k] = grays[result.data[k]];
    return result;
  }

  const drawSteps = drawing("steps", (add, width, height) => {
    const left = [...new Set(data.pictures.grays[bits.value - 1])];
    const each = width / left.length;
    left.forEach((gray, k) => {
      const fill = `rgb(${gray} ${gray} ${gray})`;
      add("rect", { x: k * each, y: 0, width: each + (k < left.length - 1 ? 0.5 : 0), height, fill });
    });
    add("rect", { x: 0.5, y: 0.5, width: width - 1, height: height - 1, class: "axis" });
  });

  function show() {
    const grays = data.pictures.grays[bits.value - 1];
    const text = `${bits.value} ${bits.value === "1" ? "bit" : "bits"}, ${new Set(grays).size} steps`;
    $("bits-out").textContent = text;
    bits.setAttribute("aria-valuetext", text);
    paint("after", withFewerBits(picture, grays));
    drawSteps();
  }

  async function open(file) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      news.textContent = `${file.name} is no picture that this browser can read. PNG and JPEG always are.`;
      return;
    }
    const shrink = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * shrink));
    canvas.height = Math.max(1, Math.round(bitmap.height * shrink));
    const context = canvas.getContext("2d");
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    picture = context.getImageData(0, 0, canvas.width, canvas.height);
    news.textContent = `${file.name}, ${bitmap.width} × ${bitmap.height} pixels`;
    paint("before", picture);
    show();
  }

  paint("before", picture);
  follow([bits], show);
  $("file").addEventListener("change", (event) => event.target.files[0] && open(event.target.files[0]));

  const veil = $("drop");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    veil.hidden = false;
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) veil.hidden = true;
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    veil.hidden = true;
    if (event.dataTransfer.files[0]) {
      open(event.dataTransfer.files[0]);
      $("picture").scrollIntoView();
    }
  });
}
